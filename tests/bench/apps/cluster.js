// Node's cluster module as its documentation has it: node cluster.js COUNT APP [ARGUMENT...]
//
// SIGUSR2 has it fork as many new workers, and retire the old ones when all of the new ones listen: a polite one is
// told to stop, others are disconnected, and each is killed after the time that reuse-run's --drain grants.
const cluster = require('node:cluster');

const [count, exec, ...args] = process.argv.slice(2);
cluster.setupPrimary({ exec, args });
const patience = Number(process.env.BENCH_PATIENCE_MS ?? 10_000);
let workers = fork();

function fork() {
  return Array.from({ length: Number(count) }, (_, slot) => cluster.fork({ NODE_APP_INSTANCE: slot }));
}

process.on('SIGUSR2', () => {
  const old = workers;
  let waiting = old.length;
  workers = fork();
  for (const worker of workers) worker.once('listening', () => --waiting || old.forEach(retire));
});

function retire(worker) {
  // disconnect() has a worker close its http.Server, which ends connections that are idle or look so.
  if (args.includes('polite')) worker.process.kill('SIGINT');
  else worker.disconnect();
  const timer = setTimeout(() => worker.process.kill('SIGKILL'), patience);
  worker.process.once('exit', () => clearTimeout(timer));
}

process.on('SIGTERM', () => {
  workers.forEach((worker) => worker.process.kill('SIGKILL'));
  process.exit();
});
