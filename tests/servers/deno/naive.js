const generation = Deno.env.get('REUSE_RUN_GENERATION');

Deno.serve({ port: Number(Deno.env.get('PORT')) }, () =>
  new Response(`pid=${Deno.pid} generation=${generation}\n`));
