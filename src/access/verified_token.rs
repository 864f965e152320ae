//! Recognises a token that the same connection has sent before, at a fifth of the cost of hashing it with SHA-256.
//!
//! Nothing of the token's text is kept, only its fingerprint: the 128 bits of a SipHash-2-4 under a random key that
//! never leaves the process. Without the key, nobody can make another text with the same fingerprint but by chance, and
//! each attempt has a chance of 2⁻¹²⁸.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use siphasher::sip128::{Hash128, SipHasher24};
use zeroize::Zeroizing;

use crate::access::grants::Bearer;
use crate::keys::generator::{Generator, GeneratorError};

/// Makes the fingerprints of a process.
pub(crate) struct Fingerprinter(SipHasher24);

impl Fingerprinter {
    /// One with a new key.
    ///
    /// # Errors
    /// The generator fails.
    pub(crate) fn new(generator: &Generator) -> Result<Self, GeneratorError> {
        let mut key = Zeroizing::new([0; 16]);
        generator.fill(&mut key[..])?;
        Ok(Self(SipHasher24::new_with_key(&key)))
    }

    /// The fingerprint of an `Authorization` header.
    pub(crate) fn fingerprint(&self, credentials: &[u8]) -> Fingerprint {
        Fingerprint(self.0.hash(credentials))
    }
}

impl fmt::Debug for Fingerprinter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprinter")
    }
}

/// The fingerprint of an `Authorization` header. Fingerprints are compared in constant time, by [`Hash128`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint(Hash128);

/// The token that a connection has proved to hold, if it has. Each connection owns one, so what one client sends has no
/// effect on another.
#[derive(Default)]
pub struct VerifiedToken(Mutex<Option<Box<Verified>>>); // in a box, since most connections never have one

struct Verified {
    fingerprint: Fingerprint,
    /// The generation of the rules that have the token.
    generation: u64,
    bearer: Arc<Bearer>,
}

impl VerifiedToken {
    /// The bearer with this fingerprint, if the rules are still those of `generation`.
    pub(crate) fn bearer(&self, fingerprint: Fingerprint, generation: u64) -> Option<Arc<Bearer>> {
        let verified = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = verified.as_ref().filter(|known| known.generation == generation)?;
        (known.fingerprint == fingerprint).then(|| Arc::clone(&known.bearer))
    }

    /// Remembers a bearer instead of the last one.
    pub(crate) fn set(&self, fingerprint: Fingerprint, generation: u64, bearer: &Arc<Bearer>) {
        let verified = Verified { fingerprint, generation, bearer: Arc::clone(bearer) };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(verified));
    }
}

impl fmt::Debug for VerifiedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerifiedToken")
    }
}
