// Socket.IO with its sessions in memory: `node app.js PORT`.
const { Server } = require('socket.io');

const server = require('http').createServer();
new Server(server).on('connection', (socket) => {
  socket.on('echo', (text, answer) => answer(text));
});
server.listen(Number(process.argv[2]));
