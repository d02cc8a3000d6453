// Node's cluster module as in its documentation: node cluster.js COUNT APP [ARGUMENT...]
//
// At SIGUSR2 it forks as many new workers and retires the old ones when all new ones listen. At SIGTERM it retires all and
// ends with the last. A polite worker gets a stop signal, another one is disconnected, and each is killed after the time of
// reuse-run's --drain.
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
  // disconnect() makes a worker close its http.Server, which closes connections that are or look idle.
  if (args.includes('polite')) worker.process.kill('SIGINT');
  else worker.disconnect();
  const timer = setTimeout(() => worker.process.kill('SIGKILL'), patience);
  worker.process.once('exit', () => clearTimeout(timer));
}

process.on('SIGTERM', () => {
  cluster.on('exit', () => Object.keys(cluster.workers).length || process.exit());
  workers.forEach(retire);
});
