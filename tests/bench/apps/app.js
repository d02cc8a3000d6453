// The app that all peers run: node app.js naive|polite [PORT]
//
// A naive one has no signal handler. A polite one stops gracefully: it accepts no more connections, closes each with its
// next answer, and exits with the last.
//
// With BENCH_HEAVY=COUNT the workers of the first COUNT slots block for 200 ms in every fiftieth request. BENCH_SEED and the
// id of the request decide which, so it is the same for all peers. Appends a line to the file BENCH_READY when it listens.
//
// It speaks BENCH_PROTOCOL: http (the default), https or h2. Each answer takes BENCH_WORK_MS, and each request appends a line
// to the file BENCH_BEGUN if there is one.
const fs = require('node:fs');
const http = require('node:http');
const http2 = require('node:http2');
const https = require('node:https');
const net = require('node:net');
const path = require('node:path');

const [manner, port] = process.argv.slice(2);
const { BENCH_HEAVY = 0, BENCH_SEED, NODE_APP_INSTANCE: slot, REUSE_RUN_GENERATION: generation } = process.env;
const { BENCH_BEGUN, BENCH_PROTOCOL = 'http', BENCH_WORK_MS } = process.env;
const blocks = Number(slot) < Number(BENCH_HEAVY);
const clock = new Int32Array(new SharedArrayBuffer(4));
let stopping = false;

function isHeavy(id) {
  let hash = Number(BENCH_SEED);
  for (const character of id) hash = Math.imul(hash ^ character.charCodeAt(0), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  return ((hash ^ (hash >>> 13)) >>> 0) % 50 === 0;
}

function answer(req, res) {
  const id = req.url.split('?id=')[1] ?? '-';
  // A sleep takes time only from the clients of this worker.
  if (blocks && isHeavy(id)) Atomics.wait(clock, 0, 0, 200);
  if (stopping) res.setHeader('Connection', 'close');
  const end = () => res.end(`pid=${process.pid} generation=${generation} slot=${slot} work=${id}\n`);
  if (BENCH_BEGUN) fs.appendFileSync(BENCH_BEGUN, `${id}\n`);
  if (BENCH_WORK_MS) setTimeout(end, Number(BENCH_WORK_MS));
  else end();
}

function createServer() {
  if (BENCH_PROTOCOL === 'http') return http.createServer(answer);
  const file = (name) => fs.readFileSync(path.join(__dirname, '../../apps/tls', name));
  const create = BENCH_PROTOCOL === 'h2' ? http2.createSecureServer : https.createServer;
  return create({ key: file('key.pem'), cert: file('cert.pem') }, answer);
}
const server = createServer();

// Server::Starter and the bench pass a listener. With other peers the app opens its own.
const given = process.env.SERVER_STARTER_PORT?.split('=')[1] ?? (process.env.LISTEN_FDS && 3);
server.listen(given ? { fd: Number(given) } : { port: Number(port ?? 3000) }, () => {
  fs.appendFileSync(process.env.BENCH_READY, `${process.pid}\n`);
  process.send?.('ready');
});

function stop() {
  stopping = true;
  // http.Server's close() would also close idle connections, on which a request may be on its way.
  net.Server.prototype.close.call(server);
  setInterval(() => server.getConnections((_, count) => count || process.exit()), 20);
}
if (manner === 'polite') process.on('SIGINT', stop).on('SIGTERM', stop);
