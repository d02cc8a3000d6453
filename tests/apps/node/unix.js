// Listens on a path, and at the stop signal closes its server, on which Node unlinks the path.
const http = require('node:http');
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot } = process.env;

const server = http.createServer((req, res) => {
  res.end(`pid=${process.pid} generation=${generation} slot=${slot}\n`);
});
server.listen(process.argv[2]);
process.on('SIGINT', () => server.close());
