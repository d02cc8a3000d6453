const server = Bun.serve({
  port: process.env.PORT,
  fetch: () => new Response(`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`),
});

process.on('SIGINT', () => server.stop());
