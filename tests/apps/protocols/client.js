// Clients of server.js, each request on a new connection: `node client.js KIND PORT WORK COUNT`. They begin one after the
// other within WORK milliseconds. Prints a line for each request: `ok …`, `failed …`, or `refused` if there was no connection, which ends that client. The end of stdin ends
// all, after their last answers.
const requests = require('./requests');

const [kind, port, work, count] = [process.argv[2], ...process.argv.slice(3).map(Number)];
const TIMEOUT = 30_000;
const PAUSE = 60;
let ending = false;
process.stdin.on('end', () => { ending = true; }).resume();

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function loop(client) {
  await sleep((client * work) / count);
  for (let number = 0; !ending; number++) {
    const id = `${client}-${number}`;
    const connection = { port, work, connected: false };
    try {
      const late = setTimeout(() => connection.fail?.(new Error('no answer in time')), TIMEOUT);
      const word = await new Promise((done, fail) => {
        connection.fail = fail;
        requests[kind](connection, id).then(done, fail);
      }).finally(() => clearTimeout(late));
      console.log(`ok ${word ?? ''}`);
    } catch (error) {
      console.log(connection.connected ? `failed ${id} ${error.stack}`.replaceAll('\n', ' ') : `refused ${error.message}`);
      if (!connection.connected) return;
    }
    await sleep(Math.random() * PAUSE);
  }
}

Promise.all(Array.from({ length: count }, (_, client) => loop(client))).then(() => process.exit());
