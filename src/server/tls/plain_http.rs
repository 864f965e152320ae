//! The response to a client that speaks plain HTTP on the TLS port.

use std::io;
use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use zeroize::Zeroizing;

use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;

/// The detail of the problem that a client of plain HTTP gets.
pub const PLAIN_HTTP_DETAIL: &str = "This port speaks TLS: use https://";

/// Sends a 400 over plain HTTP that tells the client to use https. The request is not parsed.
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
    // Closing with an unread request would reset the connection, and the client might lose the response. The buffer is
    // wiped, because the request may have a token.
    let mut request = Zeroizing::new([0; 1024]);
    while stream.read(&mut request[..]).await? > 0 {}
    Ok(())
}
