//! The index of the valid tokens.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use subtle::ConstantTimeEq;

use crate::access::rate_limit::{RatePolicy, Rates};
use crate::access::token;
use crate::access::tokens_file::Grant;

/// The grant of a token, and the rates of its own if it has any.
#[derive(Debug)]
pub(crate) struct Bearer {
    pub(crate) grant: Grant,
    pub(crate) rates: Option<Arc<RatePolicy>>,
}

/// Grants in the order of a keyed hash of their digests. The key is random and never leaves the process, so the time of
/// a lookup reveals nothing about a digest; the digest itself is compared in constant time.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    by_hash: Vec<(u64, Arc<Bearer>)>,
    hasher: RandomState,
}

impl Grants {
    /// The index of `grants`. The burst of rates that a token has of its own is that of `rates`.
    pub(crate) fn new(grants: &[Grant], rates: Rates) -> Self {
        let hasher = RandomState::new();
        let entry = |grant: &Grant| {
            let own = Rates { requests: grant.rate_requests, bytes: grant.rate_bytes, ..rates };
            let bearer = Bearer { grant: grant.clone(), rates: RatePolicy::new(own) };
            (hasher.hash_one(grant.digest), Arc::new(bearer))
        };
        let mut by_hash: Vec<_> = grants.iter().map(entry).collect();
        by_hash.sort_unstable_by_key(|(hash, _)| *hash);
        Self { by_hash, hasher }
    }

    /// The bearer of the token with this text.
    pub(crate) fn find(&self, token: &[u8]) -> Option<&Arc<Bearer>> {
        let digest = token::digest_of(token)?;
        let hash = self.hasher.hash_one(digest);
        let start = self.by_hash.partition_point(|(other, _)| *other < hash);
        let candidates = self.by_hash[start..].iter().take_while(|(other, _)| *other == hash);
        candidates.map(|(_, bearer)| bearer).find(|bearer| bearer.grant.digest.ct_eq(&digest).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::token::Token;
    use crate::keys::generator::{Generator, OsRandom};

    #[test]
    fn only_the_exact_token_finds_its_grant() {
        let generator = Generator::new(OsRandom).unwrap();
        let tokens = [(); 3].map(|()| Token::generate(&generator).unwrap());
        let [first, second, other] = &tokens;
        let grant = |name: &str, token: &Token| Grant::new(name.parse().unwrap(), token.digest);
        let grants = Grants::new(&[grant("first", first), grant("second", second)], Rates::default());
        let found = |text: &[u8]| grants.find(text).map(|bearer| bearer.grant.name.as_str());
        let text = first.text.as_bytes();
        assert_eq!(found(text), Some("first"));
        assert_eq!(found(second.text.as_bytes()), Some("second"));
        assert_eq!(found(other.text.as_bytes()), None);
        for at in 0..text.len() {
            let mut changed = text.to_vec();
            changed[at] = if text[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(found(&changed), None, "byte {at} is changed");
            assert_eq!(found(&text[..at]), None, "only {at} bytes");
        }
        assert_eq!(found(&[text, b"0"].concat()), None, "a digit too many");
        assert_eq!(found(text.to_ascii_uppercase().as_slice()), None, "capital letters");
        assert_eq!(found(&first.digest), None, "the digest itself");
    }

    #[test]
    fn grants_with_the_same_hash_are_distinguished() {
        let generator = Generator::new(OsRandom).unwrap();
        let tokens = [(); 3].map(|()| Token::generate(&generator).unwrap());
        let names = ["first", "second"].map(|name| name.parse().unwrap());
        let known: Vec<_> =
            names.into_iter().zip(&tokens).map(|(name, token)| Grant::new(name, token.digest)).collect();
        // As if the keyed hashes of all three digests collided.
        let found = tokens.each_ref().map(|token| {
            let mut grants = Grants::new(&known, Rates::default());
            let hash = grants.hasher.hash_one(token.digest);
            grants.by_hash.iter_mut().for_each(|(other, _)| *other = hash);
            grants.find(token.text.as_bytes()).map(|bearer| bearer.grant.name.to_string())
        });
        assert_eq!(found, [Some("first".to_owned()), Some("second".to_owned()), None]);
    }
}
