export const dynamic = 'force-dynamic';

export default function Page() {
  return <p>{`pid=${process.pid} generation=${process.env.REUSE_RUN_GENERATION}`}</p>;
}
