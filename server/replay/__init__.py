"""`trtserve replay`: a trace of requests in virtual time, through the server's own router, modes and policies."""
