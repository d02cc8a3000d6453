// An ES module that sends 'ready' on Node's IPC channel, if there is one.
//
// Arguments after the port are other messages to send, in JSON. `/ipc` shows the state of the channel. `/flood` answers
// when the callbacks of 100,000 messages and of one of a megabyte have been called.
import http from 'node:http';

const [port, ...messages] = process.argv.slice(2);
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot, NODE_CHANNEL_FD: fd } = process.env;
const who = `pid=${process.pid} generation=${generation} slot=${slot}`;

process.on('disconnect', () => console.log(`disconnect ${who}`));

async function flood() {
  let called = 0;
  const send = (message) => new Promise((resolve, reject) => {
    process.send(message, (error) => (error ? reject(error) : resolve(++called)));
  });
  console.log(`flood ${who}`);
  const large = send('x'.repeat(1_000_000));
  for (let sent = 0; sent < 100_000; sent += 1000) {
    await Promise.all(Array.from({ length: 1000 }, (_, index) => send({ not: 'ready', index })));
  }
  await large;
  return `called=${called}`;
}

const server = http.createServer(async (req, res) => {
  let text = '';
  if (req.url === '/ipc') text = `connected=${process.connected} send=${typeof process.send} fd=${fd}`;
  if (req.url === '/flood') text = await flood().catch((error) => `failed=${error}`);
  res.end(`${who} ${text}\n`);
});

server.listen(Number(port), '127.0.0.1', () => {
  if (messages.length === 0) process.send?.('ready');
  for (const message of messages) process.send(JSON.parse(message));
});
