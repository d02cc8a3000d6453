// Listens on a path: node unix.js PATH. At the stop signal it closes the server, and Node unlinks the path. That also closes a
// connection that was accepted a moment before, and whose request it hasn't read.
const http = require('node:http');
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot } = process.env;

const server = http.createServer((req, res) => {
  res.end(`pid=${process.pid} generation=${generation} slot=${slot}\n`);
});
server.listen(process.argv[2]);
process.on('SIGINT', () => server.close());
