//! What a reload changes, and what it must not.

use super::settings::{Config, settings};
use super::table::{Reload, Setting};

impl Config {
    /// Settings that protect keys, that are on here and off in `new`, and that a reload turns off at once.
    pub fn removed_by_reload(&self, new: &Self) -> Vec<&'static str> {
        settings()
            .into_iter()
            .zip(Self::default().values())
            .zip(self.values().into_iter().zip(new.values()))
            .filter(|((setting, off), (old, new_value))| {
                setting.protects && old != off && new_value == off && self.is_applied(new, setting)
            })
            .map(|((setting, _), _)| setting.name)
            .collect()
    }

    /// Whether `new` has no TLS where `self` has: the running service keeps it, and a restart removes it.
    pub fn loses_tls_at_restart(&self, new: &Self) -> bool {
        self.tls_cert.is_some() && new.tls_cert.is_none()
    }

    /// The settings that differ in `new` and take effect only at a restart.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        settings()
            .into_iter()
            .zip(self.values().into_iter().zip(new.values()))
            .filter(|(setting, (old, new_value))| old != new_value && !self.is_applied(new, setting))
            .map(|(setting, _)| setting.name)
            .collect()
    }

    /// Takes from `new` what may change while the service runs. TLS has [`Config::apply_tls`].
    pub fn apply_reloadable(&mut self, new: &Self) {
        self.file.clone_from(&new.file);
        self.grants = new.grants.clone();
        self.apply(new, Reload::Applied);
    }

    /// Takes the TLS settings from `new`.
    pub fn apply_tls(&mut self, new: &Self) {
        self.apply(new, Reload::AppliedWithTls);
    }

    fn is_applied(&self, new: &Self, setting: &Setting) -> bool {
        match setting.reload {
            Reload::Applied => true,
            Reload::AppliedWithTls => self.tls_cert.is_some() && new.tls_cert.is_some(),
            Reload::NeedsRestart => false,
        }
    }
}
