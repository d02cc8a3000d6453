// app.js
const express = require('express');
const app = express();
const port = 3000;

app.get('/', (req, res) => {
  console.log(`Request received by PID ${process.pid} at ${new Date().toISOString()}`);
  res.send(`Hello from process ${process.pid}!`);
});

app.listen(port, () => {
  console.log(`App listening on port ${port} with PID ${process.pid}`);
});
