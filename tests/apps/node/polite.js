// A server with a graceful stop for keep-alive clients: after SIGINT each answer has `Connection: close`. It closes no idle
// connection itself, because a request may be on its way.
const http = require('http');
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot } = process.env;

let stopping = false;

const server = http.createServer((req, res) => {
  if (stopping) res.setHeader('Connection', 'close');
  res.end(`pid=${process.pid} generation=${generation} slot=${slot}\n`);
});

server.listen(Number(process.argv[2]) || 3000);

process.on('SIGINT', () => {
  stopping = true;
  setInterval(() => server.getConnections((_, count) => count || process.exit()), 100);
  setTimeout(() => process.exit(), 25_000);
});
