const http = require('http');

http.createServer((req, res) => {
  res.end(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
}).listen(process.env.PORT);
