"""What several API processes share: the jobs of POST /jobs, in Redis."""
