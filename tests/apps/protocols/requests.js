// One request for each kind of client. Each function resolves when the whole right answer has come, and sets
// `connection.connected` when TCP has connected.
const assert = require('assert');
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const http2 = require('http2');
const https = require('https');
const net = require('net');
const path = require('path');
const tls = require('tls');
const frames = require('./frames');

const HOST = '127.0.0.1';
const ca = fs.readFileSync(path.join(__dirname, '../tls/cert.pem'));
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

function watch(connection, socket) {
  socket.on('connect', () => { connection.connected = true; });
  socket.on('error', connection.fail);
  return socket;
}

const tcp = (connection) => watch(connection, net.connect(connection.port, HOST));

async function text(response) {
  let body = '';
  for await (const chunk of response) body += chunk;
  return body;
}

// HTTP/1 by `module`, the body sent by `send`. Resolves with the body of the answer.
function http1(module, connection, path, options = {}, send = (request) => request.end()) {
  return new Promise((done, fail) => {
    const request = module.request({ host: HOST, port: connection.port, path, agent: false, ca, ...options });
    request.on('socket', (socket) => watch(connection, socket));
    request.on('error', fail);
    request.on('response', (response) => text(response).then(done, fail));
    send(request);
  });
}

async function get(module, connection, id, options) {
  assert.equal(await http1(module, connection, `/${id}`, options), `done ${id} 0\n`);
}

// TLS of one version, with the session of the client's last connection if `resume`.
let session;
async function overTls(connection, id, version, resume) {
  const options = { minVersion: version, maxVersion: version, session: resume ? session : undefined };
  const socket = watch(connection, tls.connect({ host: HOST, port: connection.port, ca, ...options }));
  socket.on('session', (next) => { session = next; });
  await get(https, connection, id, { agent: undefined, createConnection: () => socket });
  return socket.isSessionReused() ? 'resumed' : '';
}

// Sends the body only when the server has said `100 Continue` and some time has passed.
async function expect(connection, id) {
  const body = 'x'.repeat(1000);
  const send = (request) => {
    request.on('continue', () => setTimeout(() => request.end(body), connection.work / 2));
    request.flushHeaders();
  };
  const headers = { Expect: '100-continue', 'Content-Length': body.length };
  const answer = await http1(http, connection, `/${id}`, { method: 'POST', headers }, send);
  assert.equal(answer, `done ${id} ${body.length}\n`);
}

// Sends the body in ten chunks.
async function upload(connection, id) {
  const send = async (request) => {
    for (let number = 0; number < 10; number++) {
      request.write('x'.repeat(100));
      await sleep(connection.work / 10);
    }
    request.end();
  };
  assert.equal(await http1(http, connection, `/upload/${id}`, { method: 'POST' }, send), `done ${id} 1000\n`);
}

async function events(connection, id) {
  const expected = [1, 2, 3, 4, 5].map((number) => `data: ${number} ${id}\n\n`).join('') + 'data: end\n\n';
  assert.equal(await http1(http, connection, `/events/${id}`), expected);
}

async function lines(connection, id) {
  const socket = tcp(connection);
  socket.write(`${id}\n`);
  const line = await new Promise((done, fail) => {
    frames.lines(socket, done);
    socket.on('close', () => fail(new Error('closed before the answer')));
  });
  socket.destroy();
  assert.equal(line, `done ${id}`);
}

function websocket(connection, id) {
  return new Promise((done, fail) => {
    const headers = {
      Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Version': 13,
      'Sec-WebSocket-Key': crypto.randomBytes(16).toString('base64'),
    };
    const request = http.get({ host: HOST, port: connection.port, agent: false, headers });
    request.on('socket', (socket) => watch(connection, socket));
    request.on('error', fail);
    request.on('upgrade', (response, socket) => {
      let answer = 'nothing';
      frames.messages(socket, (message) => {
        if (message === null) return socket.end();
        answer = message;
        socket.write(frames.close(true));
      });
      socket.on('close', () => (answer === `done ${id}` ? done() : fail(new Error(`${answer}, then closed`))));
      socket.write(frames.message(id, true));
    });
  });
}

function stream(session, id, connection) {
  return new Promise((done, fail) => {
    connection.fail = fail;
    session.on('error', fail);
    session.on('close', () => fail(new Error('the session has ended')));
    const request = session.request({ ':path': `/${id}` });
    request.on('error', fail);
    text(request).then((answer) => assert.equal(answer, `done ${id} 0\n`)).then(done, fail);
  });
}

// `count` streams at a time, in `rounds` rounds, on one connection.
async function streams(scheme, connection, id, count, rounds) {
  const secure = () => watch(connection, tls.connect({ host: HOST, port: connection.port, ca, ALPNProtocols: ['h2'] }));
  const createConnection = () => (scheme === 'https' ? secure() : tcp(connection));
  const session = http2.connect(`${scheme}://${HOST}:${connection.port}`, { createConnection });
  session.setMaxListeners(0);
  session.on('error', connection.fail);
  try {
    for (let round = 0; round < rounds; round++) {
      const one = async (_, number) => {
        await sleep(number * 20);
        await stream(session, `${id}-${round}-${number}`, connection);
      };
      await Promise.all(Array.from({ length: count }, one));
    }
  } finally {
    session.destroy();
  }
}

module.exports = {
  http: (connection, id) => get(http, connection, id),
  'tls1.2': (connection, id) => overTls(connection, id, 'TLSv1.2', false),
  'tls1.3': (connection, id) => overTls(connection, id, 'TLSv1.3', false),
  'tls1.2-resumed': (connection, id) => overTls(connection, id, 'TLSv1.2', true),
  'tls1.3-resumed': (connection, id) => overTls(connection, id, 'TLSv1.3', true),
  h2: (connection, id) => streams('https', connection, id, 1, 1),
  h2c: (connection, id) => streams('http', connection, id, 1, 1),
  'h2-kept': (connection, id) => streams('https', connection, id, 3, 2),
  expect, upload, events, lines, websocket,
};
