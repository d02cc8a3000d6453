const express = require('express');

const app = express();
app.get('/', (req, res) => {
  res.send(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
});
app.listen(process.env.PORT);
