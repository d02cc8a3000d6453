// Clients for the protocols of app.js: node clients.js http|https|h2 PORT COUNT [once]
//
// Each client opens a new connection for each request, or makes one request only. At the end of stdin it finishes the request
// that it has begun. Then what all clients have seen is printed as JSON. A client never retries.
const fs = require('node:fs');
const http = require('node:http');
const http2 = require('node:http2');
const https = require('node:https');
const path = require('node:path');

const [protocol, port, count, once] = process.argv.slice(2);
const ca = fs.readFileSync(path.join(__dirname, '../../apps/tls/cert.pem'));
const target = { host: '127.0.0.1', port, ca, agent: false };
const TIMEOUT = 5000;
const KINDS = { ECONNREFUSED: 'refused', ECONNRESET: 'reset', ABORT_ERR: 'time-out' };
const seen = { requests: 0, failed: 0, failures: {}, example: null };
let stopping = false;

/** Resolves to status and body of an answer on a new connection. */
function get1(path, signal) {
  return new Promise((resolve, reject) => {
    const request = (protocol === 'https' ? https : http).get({ ...target, path, signal }, (response) => {
      let body = '';
      response.on('data', (data) => (body += data)).on('error', reject);
      response.on('end', () => resolve([response.statusCode, body]));
    });
    request.on('error', reject);
  });
}

/** The same over HTTP/2. */
function get2(path, signal) {
  return new Promise((resolve, reject) => {
    const session = http2.connect(`https://${target.host}:${port}`, target);
    const stream = session.request({ ':path': path }, { signal });
    let [status, body] = [0, ''];
    stream.on('response', (headers) => (status = headers[':status']));
    stream.on('data', (data) => (body += data));
    for (const part of [session, stream]) part.on('error', reject);
    stream.on('close', () => {
      session.destroy();
      if (status) resolve([status, body]);
      else reject(Object.assign(new Error('closed without an answer'), { code: 'end of file' }));
    });
  });
}

async function client(name) {
  for (let n = 0; !stopping; n++) {
    const id = `${name}-${n}`;
    try {
      const get = protocol === 'h2' ? get2 : get1;
      const [status, body] = await get(`/?id=${id}`, AbortSignal.timeout(TIMEOUT));
      if (status !== 200 || !body.endsWith(` work=${id}\n`)) throw new Error(`bad response ${status}: '${body}'`);
    } catch (error) {
      const code = error.cause?.code ?? error.code;
      const kind = KINDS[code] ?? code ?? 'bad response';
      seen.failed++;
      seen.failures[kind] = (seen.failures[kind] ?? 0) + 1;
      seen.example ??= String(error);
      // A refusal comes at once.
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    seen.requests++;
    if (once) return;
  }
}

const clients = Array.from({ length: Number(count) }, (_, index) => client(`c${index}`));
process.stdin.resume().on('end', async () => {
  stopping = true;
  await Promise.all(clients);
  console.log(JSON.stringify(seen));
  process.exit();
});
