"""Types that every layer shares: specifications, requests, errors."""
