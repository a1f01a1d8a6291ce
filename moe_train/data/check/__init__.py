"""`moe-train data check`: problems in records, and what training on them will take."""
