//! Generates a streamed key of `stream BYTES` bytes, without a server or a client.
//!
//! For each chunk it does what the daemon does, except sending it: a kernel seed, its self-test, AES-256-CTR, and
//! wiping the chunk when it is dropped. `benches/compare/run` compares its CPU time with that of OpenSSL's AES-256-CTR.
//! The rest of the cost of a streamed key is the kernel's, which copies it to the client.

use std::error::Error;
use std::sync::Arc;

use key_service::keys::encoded_stream::EncodedStream;
use key_service::keys::format::{Format, Kind};
use key_service::keys::generator::{Generator, OsRandom};
use key_service::keys::key::KeyLength;
use key_service::keys::key_spec::KeySpec;

fn main() -> Result<(), Box<dyn Error>> {
    let bytes = std::env::args().nth(1).ok_or("usage: stream BYTES")?.parse()?;
    let length = KeyLength::new(bytes, u64::MAX)?;
    let spec = KeySpec::new(Kind::Key, length, Format::Raw, None).expect("one key is not a batch");
    for chunk in EncodedStream::start(&spec, Arc::new(Generator::new(OsRandom)?))? {
        std::hint::black_box(chunk?);
    }
    Ok(())
}
