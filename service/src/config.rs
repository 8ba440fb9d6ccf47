//! Configuration in three layers: a flag wins over its environment variable, which wins over the file.
//!
//! A daemon declares its flags once, as a `clap` struct whose fields name their environment variables. The file
//! (`--config FILE` or `MESH_CONFIG`) is a JSON object whose keys are the long flags; a key that is no flag is refused.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command, Parser};
use serde_json::Value;

/// What a process exits with when its configuration cannot be run (`EX_USAGE`).
pub const EXIT_BAD_CONFIG: u8 = 64;

const FLAG: &str = "config";
const VARIABLE: &str = "MESH_CONFIG";

/// The process's configuration; prints help or the mistake, and exits, where there is none (0 for help and version,
/// [`EXIT_BAD_CONFIG`] for mistakes).
pub fn parse<P: Parser>() -> P {
    let args: Vec<OsString> = std::env::args_os().collect();
    parse_from(&args, std::env::var_os(VARIABLE)).unwrap_or_else(|e| {
        // A closed stdout or stderr leaves nobody to tell.
        let _unprinted = e.print();
        let code = if e.use_stderr() { EXIT_BAD_CONFIG } else { 0 };
        std::process::exit(code.into())
    })
}

/// The configuration out of `args` (the first is the program's name), the environment, and the file that `args` name or
/// else `file`.
///
/// # Errors
/// `clap`'s, which also says when help was asked for.
pub fn parse_from<P: Parser>(args: &[OsString], file: Option<OsString>) -> Result<P, clap::Error> {
    let mut command = P::command().arg(
        Arg::new(FLAG)
            .long(FLAG)
            .value_name("FILE")
            .help(format!("JSON object of flags, below flags and environment [env: {VARIABLE}=]"))
            .action(ArgAction::Set),
    );
    if let Some(path) = named_file(args).or(file) {
        command = layered(command, Path::new(&path))?;
    }
    let matches = command.try_get_matches_from(args)?;
    P::from_arg_matches(&matches)
}

/// The mistake on stderr, and [`EXIT_BAD_CONFIG`].
pub fn refuse(mistake: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("error: {mistake}");
    ExitCode::from(EXIT_BAD_CONFIG)
}

fn named_file(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or_default();
        if text == "--" {
            return None;
        }
        if text == "--config" {
            return args.next().cloned();
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    None
}

/// The file's values as the flags' defaults: what the command line and the environment both win over.
fn layered(mut command: Command, path: &Path) -> Result<Command, clap::Error> {
    let at = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| mistake(&mut command, ErrorKind::Io, format!("configuration file {at} cannot be read: {e}")))?;
    let values: serde_json::Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        mistake(&mut command, ErrorKind::InvalidValue, format!("configuration file {at} is not a JSON object: {e}"))
    })?;
    for (key, value) in values {
        let id =
            command.get_arguments().find(|a| a.get_long() == Some(&key) && key != FLAG).map(|a| a.get_id().clone());
        let Some(id) = id else {
            let what =
                format!("configuration file {at}: {key:?} is no flag of this program; see --help for those it has");
            return Err(mistake(&mut command, ErrorKind::UnknownArgument, what));
        };
        let Some(values) = texts(&value) else {
            let what = format!("configuration file {at}: {key:?} must be a string, number, boolean or a list of those");
            return Err(mistake(&mut command, ErrorKind::InvalidValue, what));
        };
        command = command.mut_arg(id, |a| a.default_values(values).required(false));
    }
    Ok(command)
}

fn mistake(command: &mut Command, kind: ErrorKind, what: String) -> clap::Error {
    command.error(kind, what)
}

fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Number(number) => Some(vec![number.to_string()]),
        Value::Bool(flag) => Some(vec![flag.to_string()]),
        Value::Array(items) => {
            let texts: Option<Vec<Vec<String>>> =
                items.iter().map(|i| if i.is_array() { None } else { texts(i) }).collect();
            texts.map(|t| t.concat())
        }
        Value::Null | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[arg(long)]
        threads: usize,
        #[arg(long, env = "MESH_SERVICE_TEST_PATH_VARIABLE", default_value = "nowhere")]
        place: String,
        #[arg(long)]
        loud: bool,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn parsed(args: &[&str], file: &tempfile::NamedTempFile) -> Result<Flags, clap::Error> {
        let args: Vec<OsString> = std::iter::once("test").chain(args.iter().copied()).map(OsString::from).collect();
        parse_from(&args, Some(file.path().into()))
    }

    #[test]
    fn the_file_fills_in_what_flags_leave_open() {
        let file = file(r#"{"threads": 3, "place": "here", "loud": true}"#);
        let flags = parsed(&[], &file).unwrap();
        assert_eq!((flags.threads, flags.place.as_str(), flags.loud), (3, "here", true));
        let flags = parsed(&["--threads", "5"], &file).unwrap();
        assert_eq!((flags.threads, flags.place.as_str()), (5, "here"));
    }

    #[test]
    fn a_file_named_by_flag_wins_over_the_environments() {
        let (one, two) = (file(r#"{"threads": 1}"#), file(r#"{"threads": 2}"#));
        let path = one.path().to_str().unwrap();
        assert_eq!(parsed(&["--config", path], &two).unwrap().threads, 1);
        assert_eq!(parsed(&[&format!("--config={path}")], &two).unwrap().threads, 1);
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (text, named) in [
            (r#"{"threads": 1, "thread": 2}"#, "\"thread\" is no flag"),
            (r#"{"config": "x"}"#, "\"config\" is no flag"),
            (r#"{"threads": {}}"#, "\"threads\" must be"),
            (r#"["threads"]"#, "not a JSON object"),
            (r#"{"threads": "many"}"#, "many"),
        ] {
            let refused = parsed(&[], &file(text)).unwrap_err();
            assert!(refused.to_string().contains(named), "{text}: {refused}");
            assert!(refused.use_stderr());
        }
        let gone = OsString::from("/nonexistent/mesh.json");
        let refused = parse_from::<Flags>(&["test".into()], Some(gone)).unwrap_err();
        assert!(refused.to_string().contains("/nonexistent/mesh.json"));
    }

    #[test]
    fn what_is_required_is_required_without_a_file() {
        assert!(parse_from::<Flags>(&["test".into()], None).is_err());
    }
}
