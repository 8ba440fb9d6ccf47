//! Expert nodes: gather frames, group rows by expert, run the FFN, answer.
