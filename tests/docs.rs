//! The tests and files to which the documents refer exist.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::fs;
use std::path::Path;

fn text(path: &str) -> Result<String, String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .map_err(|error| format!("{path}: {error}"))
}

/// The references in a text, in backquotes: `tests/memory.rs` or `tests/memory.rs::function`.
fn references(text: &str) -> impl Iterator<Item = &str> {
    let marked = text.split('`').skip(1).step_by(2);
    marked.filter(|path| ["tests/", "src/", "fuzz/"].iter().any(|directory| path.starts_with(directory)))
}

/// Checks that the file exists and, if the reference names a function, that the function is a test in it.
fn exists(reference: &str) -> Result<(), String> {
    let (path, function) = reference.split_once("::").unwrap_or((reference, ""));
    if function.is_empty() {
        return text(path).map(|_| ());
    }
    let file = text(path)?;
    let lines: Vec<&str> = file.lines().map(str::trim).collect();
    let starts = ["fn ", "async fn ", "def "].map(|start| format!("{start}{function}("));
    let at = lines.iter().position(|line| starts.iter().any(|start| line.starts_with(start)));
    let at = at.ok_or_else(|| format!("{path}: no function {function}"))?;
    if path.starts_with("tests/e2e/") {
        // pytest(1) runs top-level functions whose names start with test_.
        let is_test = function.starts_with("test_") && file.contains(&format!("\ndef {function}("));
        return is_test.then_some(()).ok_or_else(|| format!("{path}: {function} is not a test"));
    }
    let marks = ["#[test]", "#[tokio::test"];
    let before = lines[..at].iter().rev().take_while(|line| line.starts_with('#'));
    let is_test = before.into_iter().any(|line| marks.iter().any(|mark| line.starts_with(mark)));
    is_test.then_some(()).ok_or_else(|| format!("{path}: {function} is not a test"))
}

#[test]
fn every_threat_model_promise_names_existing_tests() {
    let document = text("docs/threat-model.md").unwrap();
    let mut promises = 0;
    for row in document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| **")).skip(1) {
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap();
        assert!(references(tests).count() > 0, "no test checks this promise: {row}");
        for reference in references(tests) {
            exists(reference).unwrap();
        }
        promises += 1;
    }
    assert!(promises > 20, "expected more than 20 promises in the table, found {promises}");
}

#[test]
fn every_file_that_a_document_names_exists() {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            let document = fs::read_to_string(&path).unwrap();
            for reference in references(&document) {
                // A command may be followed by arguments.
                let reference = reference.split(' ').next().unwrap();
                let file = reference.split("::").next().unwrap();
                let found = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
                assert!(found.exists(), "{}: {reference}", path.display());
            }
        }
    }
}

#[test]
fn a_wrong_test_name_is_detected() {
    assert!(exists("tests/docs.rs::a_wrong_test_name_is_detected").is_ok());
    assert!(exists("tests/e2e/test_system.py::test_the_sandbox_denies").is_ok());
    for wrong in [
        "tests/docs.rs::another",
        "tests/docs.rs::exists",
        "tests/no.rs",
        "tests/no.rs::a",
        "tests/e2e/test_system.py::listening",
        "tests/e2e/test_system.py::test_another",
    ] {
        assert!(exists(wrong).is_err(), "{wrong}");
    }
}
