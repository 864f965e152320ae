//! The response to a client that speaks plain HTTP on the TLS port.

use std::io;
use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;

/// What a client is told that speaks plain HTTP.
pub const PLAIN_HTTP_DETAIL: &str = "This port speaks TLS: use https://";

/// Tells a client that speaks plain HTTP to use TLS, in the only words that it understands. Its request is not looked at.
pub(super) async fn refuse_plain_http(mut stream: TimeoutStream<Stream>) -> io::Result<()> {
    let body = format!(r#"{{"title":"Bad Request","status":400,"detail":"{PLAIN_HTTP_DETAIL}"}}"#);
    let date = httpdate::HttpDate::from(SystemTime::now());
    let response = format!(
        "HTTP/1.1 400 Bad Request\r\n\
         content-type: application/problem+json\r\n\
         cache-control: no-store\r\n\
         x-content-type-options: nosniff\r\n\
         connection: close\r\n\
         content-length: {}\r\n\
         date: {date}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await?;
    // A request that is not read resets the connection, and may take the response with it. It may have a token: wiped.
    let mut request = Zeroizing::new([0; 1024]);
    while stream.read(&mut request[..]).await? > 0 {}
    Ok(())
}
