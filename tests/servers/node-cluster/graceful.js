const cluster = require('node:cluster');
const http = require('node:http');

if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
  process.on('SIGINT', () => cluster.disconnect());
} else {
  http.createServer((req, res) => {
    res.end(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
  }).listen(process.env.PORT);
}
