const http = require('http');

let stopping = false;

const server = http.createServer((req, res) => {
  if (stopping) res.setHeader('Connection', 'close');
  res.end(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
});
server.listen(process.env.PORT);

process.on('SIGINT', () => {
  stopping = true;
  setInterval(() => server.getConnections((_, count) => count || process.exit()), 100);
});
