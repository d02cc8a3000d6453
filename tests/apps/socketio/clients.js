// Socket.IO clients that stay with one transport, polling or websocket, each from an address of its own: `node clients.js
// TRANSPORT PORT COUNT`. The addresses are 127.1.0.2 and up, and each request has a new TCP connection. Prints a line for each event: `ok CLIENT` when a
// message has come back, `lost CLIENT WHY` when a session is over, `failed CLIENT WHY` when none could begin. The end of
// stdin ends all.
const http = require('http');
const { io } = require('socket.io-client');

const transport = process.argv[2];
const [port, count] = process.argv.slice(3).map(Number);
const PAUSE = 200;

function start(client) {
  const address = `127.1.${client >> 8}.${(client & 255) + 2}`;
  const agent = new http.Agent({ localAddress: address });
  const socket = io(`http://127.0.0.1:${port}`, { transports: [transport], agent, forceNew: true });
  socket.on('connect', () => {
    const session = socket.id;
    const send = () => {
      if (!socket.connected || socket.id !== session) return;
      socket.emit('echo', `${client}`, () => {
        console.log(`ok ${client}`);
        setTimeout(send, Math.random() * PAUSE);
      });
    };
    send();
  });
  socket.on('disconnect', (why, details) => console.log(`lost ${client} ${why} ${JSON.stringify(details?.context?.responseText)}`));
  socket.on('connect_error', (error) => console.log(`failed ${client} ${error.message} ${JSON.stringify(error.context?.responseText)}`));
}

for (let client = 0; client < count; client++) start(client);
process.stdin.on('end', () => process.exit()).resume();
