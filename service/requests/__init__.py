"""From a wire request to a job, and from its result to the response."""
