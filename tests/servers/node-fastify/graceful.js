const fastify = require('fastify')();

fastify.get('/', async () => `pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}\n`);
fastify.listen({ port: process.env.PORT });

process.on('SIGINT', () => fastify.close());
