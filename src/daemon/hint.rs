//! What a person who starts the daemon on a terminal can try first.

use super::listeners::Bound;
use crate::config::Config;
use crate::http::not_found::example_path;
use crate::http::query::FORMAT;
use crate::keys::format::{Format, Kind};
use crate::server::listener::Listener;
use crate::telemetry::endpoint::PAGE_PATH;

/// Where the daemon listens, the address of its page, and a command that gets a key.
#[cold]
pub(super) fn startup_hint(config: &Config, bound: &Bound) -> String {
    let mut hint = format!("\n{}\n", bound.status());
    let Some((origin, socket)) = bound.keys.iter().find_map(origin) else { return hint };
    let is_unix = socket.is_some();
    let scheme = if config.tls_cert.is_some() && !is_unix { "https" } else { "http" };
    if config.page && !is_unix {
        hint += &format!("Page:  {scheme}://{origin}{PAGE_PATH}\n");
    }
    let path = example_path(Kind::Key, b"", config.max_size);
    let options = curl_options(config, socket.as_deref());
    let hex = Format::Hex.name();
    hint += &format!("Try:   curl{options} '{scheme}://{origin}{path}?{FORMAT}={hex}'\n\n");
    hint
}

/// The host and port of a listener in a URL, and the path if it is a Unix socket. `None` for a socket without an
/// address.
fn origin(listener: &Listener) -> Option<(String, Option<String>)> {
    match listener {
        Listener::Tcp(listener) => {
            let address = listener.local_addr().ok()?;
            let is_any = address.ip().to_canonical().is_unspecified();
            Some((if is_any { format!("localhost:{}", address.port()) } else { address.to_string() }, None))
        }
        Listener::Unix(listener) => {
            let address = listener.local_addr().ok()?;
            Some(("localhost".to_owned(), Some(address.as_pathname()?.display().to_string())))
        }
    }
}

/// What curl needs besides the URL. The header with the token is in the file that docs/access.md describes.
fn curl_options(config: &Config, socket: Option<&str>) -> String {
    let mut options = String::new();
    match (socket, &config.tls_cert) {
        (Some(path), _) => options += &format!(" --unix-socket {}", quoted(path)),
        (None, Some(certificate)) => {
            // curl accepts the server's own certificate here, whatever CA has signed it.
            let path = certificate
                .path()
                .map_or_else(|_| certificate.to_string(), |path| path.display().to_string());
            options += &format!(" --cacert {}", quoted(&path));
            if config.tls_client_ca.is_some() {
                options += " --cert client.pem --key client.key";
            }
        }
        (None, None) => {}
    }
    if config.tokens_file.is_some() && !(socket.is_some() && config.unix_trust) {
        options += " -H @token.header";
    }
    options
}

/// `text` as one word of a shell.
fn quoted(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte)) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
