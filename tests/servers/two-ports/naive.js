const http = require('http');

for (const port of [process.env.PORT, process.env.PORT_2]) {
  http.createServer((req, res) => {
    res.end(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
  }).listen(port);
}
