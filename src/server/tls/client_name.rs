//! The name of a client by its certificate.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// The longest name that is accepted, in bytes.
const NAME_MAX: usize = 256;

/// Common name (RFC 5280 appendix A.1).
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// The name in a client certificate, after its kind: the first URI, else DNS name, else email address, else common
/// name.
///
/// The kind distinguishes a URI from a common name that looks like one: a CA may check URIs more strictly.
pub(super) fn client_name(certificate: &CertificateDer<'_>) -> Option<Arc<str>> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    let alternatives =
        certificate.get::<SubjectAltName>().ok()?.map(|(_, names)| names.0).unwrap_or_default();
    let ranked = alternatives.iter().filter_map(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => Some((0, printable("URI", uri.as_str())?)),
        GeneralName::DnsName(host) => Some((1, printable("DNS", host.as_str())?)),
        GeneralName::Rfc822Name(address) => Some((2, printable("email", address.as_str())?)),
        _ => None,
    });
    let alternative = ranked.min_by_key(|(rank, _)| *rank).map(|(_, name)| name);
    let common_name = || {
        let attributes = certificate.subject.0.iter().flat_map(|set| set.0.iter());
        attributes.filter(|attribute| attribute.oid == COMMON_NAME).find_map(|attribute| {
            let is_text =
                matches!(attribute.value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
            let text = std::str::from_utf8(attribute.value.value()).ok().filter(|_| is_text)?;
            printable("CN", text)
        })
    };
    alternative.or_else(common_name).map(Into::into)
}

/// `kind:name`, with everything but printable ASCII escaped; `None` if the name is empty or too long.
fn printable(kind: &str, name: &str) -> Option<String> {
    let mut text = format!("{kind}:");
    for char in name.chars() {
        match char {
            ' '..='~' if char != '\\' => text.push(char),
            _ => text.extend(char.escape_unicode()),
        }
    }
    (!name.is_empty() && text.len() <= NAME_MAX).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    /// The client name of a certificate that `prepare` sets up.
    fn name_of(prepare: impl FnOnce(&mut CertificateParams)) -> Option<String> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        prepare(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        client_name(certificate.der()).map(|name| name.to_string())
    }

    #[test]
    fn a_certificate_names_its_client_by_uri_before_weaker_names() {
        let uri = || SanType::URI("spiffe://example.org/web".try_into().unwrap());
        let dns = || SanType::DnsName("web.example.org".try_into().unwrap());
        let mail = || SanType::Rfc822Name("web@example.org".try_into().unwrap());
        let common = |params: &mut CertificateParams, name: &str| {
            params.distinguished_name.push(DnType::CommonName, name);
        };
        assert_eq!(
            name_of(|params| {
                common(params, "web");
                params.subject_alt_names = vec![mail(), dns(), uri()];
            }),
            Some("URI:spiffe://example.org/web".into())
        );
        assert_eq!(
            name_of(|params| params.subject_alt_names = vec![mail(), dns()]),
            Some("DNS:web.example.org".into())
        );
        assert_eq!(
            name_of(|params| params.subject_alt_names = vec![mail()]),
            Some("email:web@example.org".into())
        );
        assert_eq!(name_of(|params| common(params, "web")), Some("CN:web".into()));
        assert_eq!(
            name_of(|params| common(params, "URI:x")),
            Some("CN:URI:x".into()),
            "a common name can't pose as another kind"
        );
        assert_eq!(name_of(|_| {}), None);
    }

    #[test]
    fn a_name_is_printable_and_of_limited_length() {
        assert_eq!(printable("CN", "Zo\u{eb}\n\\"), Some("CN:Zo\\u{eb}\\u{a}\\u{5c}".into()));
        assert_eq!(printable("CN", ""), None);
        assert_eq!(printable("CN", &"x".repeat(NAME_MAX - 3)).unwrap().len(), NAME_MAX);
        assert_eq!(printable("CN", &"x".repeat(NAME_MAX - 2)), None);
    }
}
