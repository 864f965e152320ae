//! The name of a client, from its certificate.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// The longest name of a client that is taken from its certificate, in bytes.
const IDENTITY_MAX: usize = 256;

/// Common name (RFC 5280 appendix A.1).
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Whom a certificate names, with the kind of the name before it: its first URI, else DNS name, else mail address,
/// else common name.
///
/// The kind tells a common name that looks like a URI from a URI, which a CA may guard better.
pub(super) fn client_name(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    let alternatives =
        certificate.get::<SubjectAltName>().ok()?.map(|(_, names)| names.0).unwrap_or_default();
    let first = |kind: fn(&GeneralName) -> Option<String>| alternatives.iter().find_map(kind);
    let uri = first(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => printable("URI", uri.as_str()),
        _ => None,
    });
    let dns = || {
        first(|name| match name {
            GeneralName::DnsName(host) => printable("DNS", host.as_str()),
            _ => None,
        })
    };
    let mail = || {
        first(|name| match name {
            GeneralName::Rfc822Name(address) => printable("email", address.as_str()),
            _ => None,
        })
    };
    let common = || {
        let attributes = certificate.subject.0.iter().flat_map(|set| set.0.iter());
        attributes.filter(|attribute| attribute.oid == COMMON_NAME).find_map(|attribute| {
            let is_text =
                matches!(attribute.value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
            let text = std::str::from_utf8(attribute.value.value()).ok().filter(|_| is_text)?;
            printable("CN", text)
        })
    };
    uri.or_else(dns).or_else(mail).or_else(common).map(Into::into)
}

/// `kind:name`, where the name is neither empty nor too long; what is not printable ASCII is escaped.
fn printable(kind: &str, name: &str) -> Option<String> {
    let mut text = format!("{kind}:");
    for char in name.chars() {
        match char {
            ' '..='~' if char != '\\' => text.push(char),
            _ => text.extend(char.escape_unicode()),
        }
    }
    (!name.is_empty() && text.len() <= IDENTITY_MAX).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn named(prepare: impl FnOnce(&mut CertificateParams)) -> Option<String> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        prepare(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        client_name(certificate.der()).map(|name| name.to_string())
    }

    #[test]
    fn a_client_is_named_by_the_strongest_name_of_its_certificate() {
        let uri = || SanType::URI("spiffe://example.org/web".try_into().unwrap());
        let dns = || SanType::DnsName("web.example.org".try_into().unwrap());
        let mail = || SanType::Rfc822Name("web@example.org".try_into().unwrap());
        let common = |params: &mut CertificateParams, name: &str| {
            params.distinguished_name.push(DnType::CommonName, name);
        };
        assert_eq!(
            named(|params| {
                common(params, "web");
                params.subject_alt_names = vec![mail(), dns(), uri()];
            }),
            Some("URI:spiffe://example.org/web".into())
        );
        assert_eq!(
            named(|params| params.subject_alt_names = vec![mail(), dns()]),
            Some("DNS:web.example.org".into())
        );
        assert_eq!(
            named(|params| params.subject_alt_names = vec![mail()]),
            Some("email:web@example.org".into())
        );
        assert_eq!(named(|params| common(params, "web")), Some("CN:web".into()));
        assert_eq!(
            named(|params| common(params, "URI:x")),
            Some("CN:URI:x".into()),
            "it can't pose as another kind"
        );
        assert_eq!(named(|_| {}), None);
    }

    #[test]
    fn a_name_is_printable_and_bounded() {
        assert_eq!(printable("CN", "Zo\u{eb}\n\\"), Some("CN:Zo\\u{eb}\\u{a}\\u{5c}".into()));
        assert_eq!(printable("CN", ""), None);
        assert_eq!(printable("CN", &"x".repeat(IDENTITY_MAX - 3)).unwrap().len(), IDENTITY_MAX);
        assert_eq!(printable("CN", &"x".repeat(IDENTITY_MAX - 2)), None);
    }
}
