// Lines and WebSocket messages (RFC 6455) in the data of a socket. Messages are text of at most 125 bytes.
function lines(socket, each) {
  let rest = '';
  socket.on('data', (chunk) => {
    const parts = (rest + chunk).split('\n');
    rest = parts.pop();
    parts.forEach(each);
  });
}

const TEXT = 0x81;
const CLOSE = 0x88;
const MASKED = 0x80;

// A message of a server, or, masked with zeroes, of a client.
function message(text, masked = false) {
  const body = Buffer.from(text);
  const head = masked ? [TEXT, MASKED | body.length, 0, 0, 0, 0] : [TEXT, body.length];
  return Buffer.concat([Buffer.from(head), body]);
}

const close = (masked = false) => Buffer.from(masked ? [CLOSE, MASKED, 0, 0, 0, 0] : [CLOSE, 0]);

// Calls `each` with each message of the peer, and with null when it closes.
function messages(socket, each) {
  let rest = Buffer.alloc(0);
  socket.on('data', (chunk) => {
    rest = Buffer.concat([rest, chunk]);
    while (rest.length >= 2) {
      const begin = 2 + (rest[1] & MASKED ? 4 : 0);
      const end = begin + (rest[1] & ~MASKED);
      if (rest.length < end) return;
      each(rest[0] === CLOSE ? null : rest.toString('utf8', begin, end));
      rest = rest.subarray(end);
    }
  });
}

module.exports = { lines, message, messages, close };
