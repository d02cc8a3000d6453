use std::{env, io, process};

use axum::{Router, routing::get};
use tokio::{net::TcpListener, signal};

#[tokio::main]
async fn main() -> io::Result<()> {
    let port: u16 = env::var("PORT").unwrap().parse().unwrap();
    let generation = env::var("REUSE_RUN_GENERATION").unwrap_or_default();
    let body = format!("pid={} generation={generation}\n", process::id());
    let app = Router::new().route("/", get(|| async { body }));

    let server = axum::serve(TcpListener::bind(("0.0.0.0", port)).await?, app);
    if env::args().len() == 1 {
        server.await
    } else {
        server.with_graceful_shutdown(async { signal::ctrl_c().await.unwrap() }).await
    }
}
