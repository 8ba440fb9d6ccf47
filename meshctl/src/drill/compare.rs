//! Tokens of the disturbed run beside those of the undisturbed one, bit for bit.

use serde::Serialize;

use super::load::Answer;

/// Differences that are told one by one.
const DIFFERENCES_MAX: usize = 16;

/// A request whose tokens differ: its first difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Its number among the plan's requests.
    pub request: u64,
    /// Its number in the disturbed run, in which requests come again.
    pub sent_as: u64,
    /// Which token, from 0.
    pub token: usize,
    /// What the undisturbed run has there, if anything.
    pub wanted: Option<u32>,
    /// What came, if anything.
    pub found: Option<u32>,
}

/// What the comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Answers compared, those of failed requests as far as they came included.
    pub requests: u64,
    /// Tokens compared.
    pub tokens: u64,
    /// Answers that differ anywhere.
    pub requests_different: u64,
    /// Tokens that differ, are missing in a complete answer, or are too many.
    pub tokens_different: u64,
    /// The first few.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Compares every answer, also what came before a request failed or was sent again.
    pub fn of(undisturbed: &[Answer], disturbed: &[Answer]) -> Self {
        let mut comparison = Self::default();
        for answer in disturbed {
            let request = answer.record.index % undisturbed.len().max(1) as u64;
            let wanted = undisturbed.get(request as usize).map_or(&[][..], Answer::ids);
            comparison.add(request, wanted, answer);
        }
        comparison
    }

    fn add(&mut self, request: u64, wanted: &[u32], answer: &Answer) {
        let attempts = &answer.trace.attempts;
        let complete = answer.record.failure.is_none();
        let (mut different, mut first) = (0, None);
        for (i, found) in attempts.iter().enumerate() {
            // Only a complete answer owes every token.
            let owed = if complete && i + 1 == attempts.len() { wanted.len() } else { 0 };
            for token in 0..found.len().max(owed) {
                let (wanted, found) = (wanted.get(token).copied(), found.get(token).copied());
                if wanted != found {
                    different += 1;
                    let sent_as = answer.record.index;
                    first.get_or_insert(Difference { request, sent_as, token, wanted, found });
                }
            }
            self.tokens += found.len() as u64;
        }
        self.requests += 1;
        self.tokens_different += different;
        self.requests_different += u64::from(different > 0);
        if self.differences.len() < DIFFERENCES_MAX {
            self.differences.extend(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Failure;
    use crate::drill::load::tests::answer;

    fn compare(wanted: &[u32], attempts: &[&[u32]], failure: Option<Failure>) -> Comparison {
        let undisturbed = [answer(0, &[&[7, 7]]), answer(1, &[wanted])];
        let mut disturbed = answer(3, attempts);
        disturbed.record.failure = failure;
        Comparison::of(&undisturbed, &[disturbed])
    }

    #[test]
    fn the_same_tokens_are_the_same() {
        let found = compare(&[1, 2, 3], &[&[1, 2, 3]], None);
        assert_eq!((found.requests, found.tokens, found.requests_different, found.tokens_different), (1, 3, 0, 0));
    }

    #[test]
    fn another_token_a_missing_one_and_one_too_many_are_differences() {
        let found = compare(&[1, 2, 3], &[&[1, 9, 9]], None);
        assert_eq!((found.requests_different, found.tokens_different), (1, 2));
        let first = Difference { request: 1, sent_as: 3, token: 1, wanted: Some(2), found: Some(9) };
        assert_eq!(found.differences, [first]);
        let short = compare(&[1, 2, 3], &[&[1, 2]], None);
        assert_eq!((short.tokens_different, short.differences[0].found), (1, None));
        let long = compare(&[1, 2], &[&[1, 2, 3]], None);
        assert_eq!((long.tokens_different, long.differences[0].wanted), (1, None));
    }

    #[test]
    fn a_failed_answer_owes_nothing_but_the_truth() {
        let cut = Some(Failure::StreamCut);
        assert_eq!(compare(&[1, 2, 3], &[&[1, 2]], cut).requests_different, 0);
        assert_eq!(compare(&[1, 2, 3], &[&[1, 9]], cut).requests_different, 1);
        let again = compare(&[1, 2, 3], &[&[1, 2], &[1, 2, 3]], None);
        assert_eq!((again.tokens, again.requests_different), (5, 0));
        assert_eq!(compare(&[1, 2, 3], &[&[1, 9], &[1, 2, 3]], None).tokens_different, 1, "what was shown counts");
    }

    #[test]
    fn few_differences_are_told_and_all_are_counted() {
        let undisturbed = [answer(0, &[&[1]])];
        let disturbed: Vec<Answer> = (0..100).map(|index| answer(index, &[&[2]])).collect();
        let found = Comparison::of(&undisturbed, &disturbed);
        assert_eq!((found.requests_different, found.differences.len()), (100, DIFFERENCES_MAX));
    }
}
