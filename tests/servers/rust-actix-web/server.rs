use std::{env, io, process};

use actix_web::{App, HttpServer, web};

#[actix_web::main]
async fn main() -> io::Result<()> {
    let port: u16 = env::var("PORT").unwrap().parse().unwrap();
    let generation = env::var("REUSE_RUN_GENERATION").unwrap_or_default();
    let body = format!("pid={} generation={generation}\n", process::id());
    let app = move || {
        let body = body.clone();
        App::new().route("/", web::get().to(move || std::future::ready(body.clone())))
    };
    HttpServer::new(app).workers(2).bind(("0.0.0.0", port))?.run().await
}
