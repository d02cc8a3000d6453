'use strict'
// A server whose worker in slot 0 also does a job every 20 ms, until it is told that it is retired.
const http = require('http')

if (process.env.REUSE_RUN_SLOT === '0') {
  const jobs = setInterval(() => console.log('job', process.pid), 20)
  process.on('SIGUSR2', () => {
    clearInterval(jobs)
    console.log('retired', process.pid)
  })
} else {
  process.on('SIGUSR2', () => {})
}

http.createServer((request, response) => setTimeout(() => response.end(), 1000)).listen(Number(process.argv[2]), '127.0.0.1')
