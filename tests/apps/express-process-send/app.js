// app.js (modified for wait_ready)
const express = require('express');
const app = express();
const port = 3000;

app.get('/', (req, res) => {
  console.log(`Request received by PID ${process.pid} at ${new Date().toISOString()}`);
  res.send(`Hello from process ${process.pid}!`);
});

const server = app.listen(port, () => {
  console.log(`App listening on port ${port} with PID ${process.pid}`);
});

// This is the key for wait_ready
server.on('listening', () => {
  process.send('ready'); // Emits the 'ready' event PM2 listens for
});
