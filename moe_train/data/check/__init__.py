"""What is wrong with records, and what training on them will take: `moe-train data check`."""
