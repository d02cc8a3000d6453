// Serves given listeners (sd_listen_fds(3)), the fds from 3 on.
const http = require('http');
const { LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES, READY_FD } = process.env;
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot } = process.env;
const who = `pid=${process.pid} generation=${generation} slot=${slot}`;

console.log(`given ${who} listen_pid=${LISTEN_PID} fds=${LISTEN_FDS} names=${LISTEN_FDNAMES} ready_fd=${READY_FD}`);
for (let fd = 3; fd < 3 + Number(LISTEN_FDS); fd++) {
  http.createServer((req, res) => res.end(`${who}\n`)).listen({ fd });
}
