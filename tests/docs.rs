//! What the documents say of the tests is so.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::fs;
use std::path::Path;

fn text(path: &str) -> Result<String, String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .map_err(|error| format!("{path}: {error}"))
}

/// The paths of tests in a text, as they are marked: `tests/memory.rs` or `tests/memory.rs::function`.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let marked = text.split('`').skip(1).step_by(2);
    marked.filter(|path| ["tests/", "src/", "fuzz/"].iter().any(|folder| path.starts_with(folder)))
}

/// Whether the file is there, and a test of that name is in it: a function that is marked as one.
fn exists(reference: &str) -> Result<(), String> {
    let (path, function) = reference.split_once("::").unwrap_or((reference, ""));
    if function.is_empty() {
        return text(path).map(|_| ());
    }
    let file = text(path)?;
    let lines: Vec<&str> = file.lines().map(str::trim).collect();
    let starts = ["fn ", "async fn ", "def "].map(|start| format!("{start}{function}("));
    let at = lines.iter().position(|line| starts.iter().any(|start| line.starts_with(start)));
    let at = at.ok_or_else(|| format!("{path}: there is no {function}"))?;
    if path.starts_with("tests/e2e/") {
        // pytest(1) takes functions of the file itself whose names begin so.
        let is_test = function.starts_with("test_") && file.contains(&format!("\ndef {function}("));
        return is_test.then_some(()).ok_or_else(|| format!("{path}: {function} is no test"));
    }
    let marks = ["#[test]", "#[tokio::test"];
    let before = lines[..at].iter().rev().take_while(|line| line.starts_with('#'));
    let is_test = before.into_iter().any(|line| marks.iter().any(|mark| line.starts_with(mark)));
    is_test.then_some(()).ok_or_else(|| format!("{path}: {function} is no test"))
}

#[test]
fn every_promise_of_the_threat_model_names_tests_that_exist() {
    let document = text("docs/threat-model.md").unwrap();
    let mut promises = 0;
    for row in document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| **")).skip(1) {
        let held_by = row.trim_end_matches('|').rsplit('|').next().unwrap();
        assert!(named(held_by).count() > 0, "no test holds this: {row}");
        for reference in named(held_by) {
            exists(reference).unwrap();
        }
        promises += 1;
    }
    assert!(promises > 20, "the table was read: {promises} promises");
}

#[test]
fn every_file_that_a_document_names_exists() {
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            let document = fs::read_to_string(&path).unwrap();
            for reference in named(&document) {
                // A command may have arguments behind it.
                let reference = reference.split(' ').next().unwrap();
                let file = reference.split("::").next().unwrap();
                let found = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
                assert!(found.exists(), "{}: {reference}", path.display());
            }
        }
    }
}

#[test]
fn a_name_that_is_wrong_is_noticed() {
    assert!(exists("tests/docs.rs::a_name_that_is_wrong_is_noticed").is_ok());
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
