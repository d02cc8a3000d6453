// The app of the examples in README.md and docs.
const http = require('http');
const { REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot, GREETING: greeting } = process.env;

http.createServer((req, res) => {
  res.end(`pid=${process.pid} generation=${generation} slot=${slot} greeting=${greeting}\n`);
}).listen(3000);
