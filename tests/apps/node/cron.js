'use strict'
// A server whose worker in slot 0 also does a job every 20 ms, until it is told that it is retired.
const http = require('http')

// Requests last until then, so that it hears of it before the stop signal comes.
const waiting = []
let isRetired = process.env.REUSE_RUN_SLOT !== '0'

if (process.env.REUSE_RUN_SLOT === '0') {
  const jobs = setInterval(() => console.log('job', process.pid), 20)
  process.on('SIGUSR2', () => {
    clearInterval(jobs)
    isRetired = true
    console.log('retired', process.pid)
    waiting.forEach((response) => response.end())
  })
} else {
  process.on('SIGUSR2', () => {})
}

http.createServer((_, response) => isRetired ? response.end() : waiting.push(response)).listen(Number(process.argv[2]), '127.0.0.1')
