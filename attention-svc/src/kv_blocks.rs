//! The pages of the KV cache: a fixed number, taken one by one and given back whole.

/// Hands out the pages of a KV cache. Pages are numbers below `total`; each is with one sequence or free.
#[derive(Debug)]
pub struct KvBlocks {
    /// Last in, first out: what was written last is still in the processor's caches, and of a large pool the system gives out
    /// no more memory than sequences ever held at once.
    free: Vec<u32>,
    taken: Vec<bool>,
    used_max: u32,
    page_tokens: u32,
}

impl KvBlocks {
    /// `total` free pages of `page_tokens` tokens each.
    pub fn new(total: u32, page_tokens: u32) -> Self {
        let (free, taken) = ((0..total).rev().collect(), vec![false; total as usize]);
        Self { free, taken, used_max: 0, page_tokens: page_tokens.max(1) }
    }

    /// Pages that hold `tokens` tokens.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens)
    }

    /// Pages there are.
    pub fn total(&self) -> u32 {
        self.taken.len() as u32
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Most pages that were held at once: no others were ever handed out.
    pub fn used_max(&self) -> u32 {
        self.used_max
    }

    /// Extends `pages` until it covers `tokens` tokens: entirely, or not at all when too few pages are free.
    #[must_use]
    pub fn cover(&mut self, pages: &mut Vec<u32>, tokens: u32) -> bool {
        let missing = self.pages_for(tokens).saturating_sub(pages.len() as u32);
        if missing > self.free() {
            return false;
        }
        let rest = self.free.len() - missing as usize;
        for page in self.free.drain(rest..).rev() {
            debug_assert!(!self.taken[page as usize]);
            self.taken[page as usize] = true;
            pages.push(page);
        }
        self.used_max = self.used_max.max(self.total() - self.free());
        true
    }

    /// Gives back all of `pages`, which is empty afterwards.
    pub fn give_back(&mut self, pages: &mut Vec<u32>) {
        for page in pages.drain(..) {
            let taken = &mut self.taken[page as usize];
            assert!(*taken, "KV page {page} given back twice");
            *taken = false;
            self.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_whole_sequences_or_nothing_is_taken() {
        let mut kv = KvBlocks::new(4, 8);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(kv.cover(&mut a, 17));
        assert_eq!((a.len(), kv.free()), (3, 1));
        assert!(kv.cover(&mut a, 24), "already covered");
        assert_eq!(kv.free(), 1);
        assert!(!kv.cover(&mut b, 9));
        assert_eq!((b.len(), kv.free()), (0, 1));
        assert!(kv.cover(&mut b, 8));
        assert!(a.iter().all(|p| !b.contains(p)));
        kv.give_back(&mut a);
        kv.give_back(&mut b);
        assert_eq!((a.len(), kv.free(), kv.total()), (0, 4, 4));
    }

    #[test]
    fn pages_used_before_are_used_again_first() {
        let mut kv = KvBlocks::new(100, 8);
        for tokens in [40, 8, 33] {
            let mut pages = Vec::new();
            assert!(kv.cover(&mut pages, tokens));
            assert!(pages.iter().all(|page| *page < 5), "{pages:?}");
            kv.give_back(&mut pages);
        }
        assert_eq!(kv.used_max(), 5, "as many as were held at once");
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_page_is_never_given_back_twice() {
        let mut kv = KvBlocks::new(2, 8);
        let mut a = Vec::new();
        assert!(kv.cover(&mut a, 8));
        let mut copy = a.clone();
        kv.give_back(&mut a);
        kv.give_back(&mut copy);
    }
}
