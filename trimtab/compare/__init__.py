"""Same data, same budget, many objectives and seeds: results that do not change, and paired statistics over them."""
