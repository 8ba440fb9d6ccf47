//! Logs to stderr: stdout belongs to what a program is asked for.

use tracing_subscriber::EnvFilter;

use crate::ServiceError;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// The flags about logs that every daemon has.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// What to log: a level, or levels by module (`info,expert_svc=debug`).
    #[arg(long, env = "MESH_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How log lines look.
    #[arg(long, env = "MESH_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

impl LogArgs {
    /// [`init`] as the flags say.
    ///
    /// # Errors
    /// [`ServiceError::LogFilter`].
    pub fn init(&self) -> Result<(), ServiceError> {
        init(&self.log, self.log_format)
    }
}

/// Sends this process's logs to stderr. The first call counts; later ones only check their filter.
///
/// # Errors
/// [`ServiceError::LogFilter`].
pub fn init(filter: &str, format: LogFormat) -> Result<(), ServiceError> {
    let parsed = EnvFilter::builder().parse(filter);
    let parsed = parsed.map_err(|e| ServiceError::LogFilter { filter: filter.into(), reason: e.to_string() })?;
    // What cannot be logged, on a full disk say, is lost: telling that on stderr too would panic whoever logs.
    let builder =
        tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr).log_internal_errors(false);
    // A second subscriber in one process (several roles in one, tests) is refused by tracing, and the first is right.
    let _already_set = match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_does_not_parse_is_named() {
        let refused = init("info,expert_svc=loud", LogFormat::Text).unwrap_err();
        assert!(refused.to_string().contains("expert_svc=loud"), "{refused}");
    }
}
