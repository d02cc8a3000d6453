// A server of one protocol, without a signal handler: `node server.js PROTOCOL PORT WORK`. A request takes WORK
// milliseconds. The answer repeats the last word of the request, so that its client can tell that it is the right one.
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');
const http2 = require('http2');
const https = require('https');
const net = require('net');
const path = require('path');
const frames = require('./frames');

const [protocol, port, work] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const file = (name) => fs.readFileSync(path.join(__dirname, '../tls', name));
// All workers have the same keys for session tickets, as in a deployment whose clients resume their sessions.
const secure = () => ({ key: file('key.pem'), cert: file('cert.pem'), ticketKeys: Buffer.alloc(48, 1) });

// `/ID` works when the request is complete, `/upload/ID` answers it at once, `/events/ID` sends five events meanwhile.
function answer(request, response) {
  const words = request.url.split('/');
  const id = words.pop();
  let bytes = 0;
  request.on('data', (chunk) => { bytes += chunk.length; });
  request.on('end', () => {
    if (words.includes('events')) return sendEvents(response, id, 1);
    setTimeout(() => response.end(`done ${id} ${bytes}\n`), words.includes('upload') ? 0 : work);
  });
}

function sendEvents(response, id, number) {
  if (number === 1) response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write(`data: ${number} ${id}\n\n`);
  setTimeout(() => (number < 5 ? sendEvents(response, id, number + 1) : response.end('data: end\n\n')), work / 5);
}

// Answers each line.
function answerLines(socket) {
  socket.on('error', () => {});
  frames.lines(socket, (line) => setTimeout(() => socket.write(`done ${line}\n`), work));
}

// Answers each text message of a WebSocket.
function answerMessages(request, socket) {
  const key = request.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11';
  const accept = crypto.createHash('sha1').update(key).digest('base64');
  socket.on('error', () => {});
  socket.write('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
    `Sec-WebSocket-Accept: ${accept}\r\n\r\n`);
  frames.messages(socket, (text) => {
    if (text === null) socket.end(frames.close());
    else setTimeout(() => socket.write(frames.message(`done ${text}`)), work);
  });
}

// gRPC without generated code: messages behind five bytes, the last four of which are their length.
function answerCall(stream, headers) {
  let request = Buffer.alloc(0);
  const send = (text) => stream.write(Buffer.concat([Buffer.from([0, 0, 0, 0, text.length]), Buffer.from(text)]));
  const end = () => stream.end();
  stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
  stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
  stream.on('data', (chunk) => { request = Buffer.concat([request, chunk]); });
  stream.on('end', () => {
    const text = request.subarray(5).toString();
    const isUnary = headers[':path'] === '/test/Unary';
    const sendNumber = (number) => {
      if (number === 5) return end();
      send(`${number} ${text}`);
      setTimeout(sendNumber, work / 5, number + 1);
    };
    if (isUnary) setTimeout(() => { send(`done ${text}`); end(); }, work);
    else sendNumber(0);
  });
}

const servers = {
  http: () => http.createServer(answer),
  https: () => https.createServer(secure(), answer),
  h2: () => http2.createSecureServer(secure(), answer),
  h2c: () => http2.createServer(answer),
  grpc: () => http2.createServer().on('stream', answerCall),
  lines: () => net.createServer(answerLines),
  websocket: () => http.createServer().on('upgrade', answerMessages),
};
servers[protocol]().listen(port);
