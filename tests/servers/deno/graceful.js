const generation = Deno.env.get('REUSE_RUN_GENERATION');

const server = Deno.serve({ port: Number(Deno.env.get('PORT')) }, () =>
  new Response(`pid=${Deno.pid} generation=${generation}\n`));

Deno.addSignalListener('SIGINT', async () => {
  await server.shutdown();
  Deno.exit();
});
